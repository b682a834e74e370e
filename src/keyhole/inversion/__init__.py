"""Model inversion: images of a class from a trained network alone, by way of what public images look like.

Importing fills the registry.
"""

from keyhole.inversion import gmi as gmi
from keyhole.inversion import ked_mi as ked_mi
from keyhole.inversion import vmi as vmi
