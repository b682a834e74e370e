"""Data sets and small networks of the literature, and the user's own. Importing fills their registries."""

from keyhole.zoo import datasets as datasets
from keyhole.zoo import models as models
