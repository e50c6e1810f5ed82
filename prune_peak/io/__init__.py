"""Weight files, and safe access to untrusted files."""
