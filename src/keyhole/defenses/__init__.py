"""Defenses, one file for each paper, each with its counters. Importing this package fills the registry `DEFENSES`."""

from keyhole.defenses import clip as clip
from keyhole.defenses import gaussian_noise as gaussian_noise
from keyhole.defenses import prune as prune
from keyhole.defenses import random_masking as random_masking
