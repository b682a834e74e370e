"""Data sets and small networks of the literature, and the user's own. Importing fills their registries."""

from keyhole.zoo import cnn6 as cnn6
from keyhole.zoo import convnet as convnet
from keyhole.zoo import datasets as datasets
from keyhole.zoo import lenet as lenet
from keyhole.zoo import mcnn as mcnn
from keyhole.zoo import mlp as mlp
from keyhole.zoo import models as models
from keyhole.zoo import photos as photos
from keyhole.zoo import resnet as resnet
