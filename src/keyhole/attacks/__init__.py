"""Gradient-inversion attacks, one file for each paper. Importing this package fills the registry `ATTACKS`."""

from keyhole.attacks import idlg as idlg
from keyhole.attacks import inverting_gradients as inverting_gradients
