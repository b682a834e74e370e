"""The network that the clients train."""

from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    """Two convolutions, max pooling, ReLU, two linear layers: 1 x 8 x 8 pixels in [0, 1] to 10 logits."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        return self.fc2(functional.relu(self.fc1(hidden.flatten(1))))
