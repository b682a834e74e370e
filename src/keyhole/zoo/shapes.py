"""The shape of inputs as networks need it."""

from __future__ import annotations

from keyhole.errors import ModelError


def as_image(input_shape: tuple[int, ...], model: str, least: int) -> tuple[int, int, int]:
    """Channels, height and width of one input.

    Args:
        input_shape: shape of one input.
        model: name for the message.
        least: pixels that each side must have.

    Raises:
        ModelError: this is no image, or a side is too short.
    """
    if len(input_shape) != 3 or min(input_shape[1:]) < least or input_shape[0] < 1:
        raise ModelError(
            f"model '{model}' was given inputs of shape {tuple(input_shape)}; it needs images (channels, height, "
            f"width) with sides of at least {least} pixels. Set data.size, or choose another model."
        )
    channels, height, width = input_shape
    return channels, height, width
