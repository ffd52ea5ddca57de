"""Networks small enough to be trained again and again; recipes name them as a user names a network of their own."""

from torch import Tensor, nn


class Tiny(nn.Module):
    """Two 3 x 3 convolutions (8, 16 channels) with batch normalisation, mean pooling, one linear layer."""

    def __init__(self, classes: int, colours: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(colours, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
        )
        self.linear = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images).mean((2, 3)))


def tiny(classes: int, colours: int) -> nn.Module:
    return Tiny(classes, colours)


class Viewing(nn.Module):
    """A convolution and a linear layer, whose axes ``view`` joins: it takes contiguous maps alone."""

    def __init__(self, classes: int, colours: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(colours, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 64, classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images).relu()
        return self.linear(maps.view(len(maps), -1))


def viewing(classes: int, colours: int) -> nn.Module:
    return Viewing(classes, colours)
