"""Values of a config by dotted keys, such as `vision_config.intermediate_size`."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

DEFAULT_SIZE = 224  # pixels


def owner(config: PreTrainedConfig, key: str) -> tuple[PreTrainedConfig, str]:
    """The config that holds a key, and the last part of the key."""
    *path, last = key.split(".")
    for part in path:
        config = getattr(config, part)
    return config, last


def read_key(config: PreTrainedConfig, key: str) -> Any:
    """The value of a key; None where the config has no such key."""
    holder, last = owner(config, key)
    return getattr(holder, last, None)


def write_key(config: PreTrainedConfig, key: str, value: Any) -> None:
    """Set the value of a key."""
    holder, last = owner(config, key)
    setattr(holder, last, value)


def all_keys(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of those inside it."""
    parts = getattr(config, "sub_configs", None) or {}
    for key, value in vars(config).items():
        if key in parts:
            if isinstance(value, PreTrainedConfig):
                yield from all_keys(value, f"{prefix}{key}.")
        elif not key.startswith("_"):
            yield f"{prefix}{key}", value


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of what sees images: that of the tower, in classes of two towers."""
    found: PreTrainedConfig = getattr(config, "vision_config", None) or config
    return found


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of the images that a vision config takes; 224 where it does not say."""
    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
