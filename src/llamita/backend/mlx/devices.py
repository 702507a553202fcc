"""Devices of MLX by name."""

import mlx.core as mx

DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu}


def choose_device(name: str) -> mx.DeviceType:
    """Returns a device of MLX by name, its default one for "auto"; ValueError where it cannot be used."""
    if name == "auto":
        return mx.default_device().type
    if name not in DEVICES:
        raise ValueError(f"device={name!r} is not one of MLX's; give auto, cpu or gpu")
    if not mx.is_available(mx.Device(DEVICES[name])):
        raise ValueError(f"device={name!r} cannot be used: this MLX has no {name.upper()}; give auto or cpu")
    return DEVICES[name]
