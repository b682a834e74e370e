"""A small network as many projects have one: two convolutions, max pooling, ReLU, two linear layers."""

from torch import Tensor, nn
from torch.nn import functional


class SmallNet(nn.Module):
    """Reads images (b, c, h, w) that are already normalised, gives logits (b, classes)."""

    def __init__(self, channels: int, side: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc1 = nn.Linear(2 * width * (side // 4) ** 2, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))


def make(input_shape: tuple[int, ...], num_classes: int, width: int = 16) -> nn.Module:
    """Called by Keyhole once for each network, with torch already seeded.

    ``input_shape`` (c, h, w) and ``num_classes`` come from the data because the signature names them; ``width`` and
    any other argument come from the ``[model]`` section of the audit file.
    """
    channels, height, _ = input_shape
    return SmallNet(channels, height, num_classes, width)
