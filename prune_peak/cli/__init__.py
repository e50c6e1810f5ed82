"""The command line (click). Imports no torch until a command runs."""
