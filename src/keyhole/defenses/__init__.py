"""Defenses, one file for each paper, each with its counters. Importing this package fills the registry `DEFENSES`."""

from keyhole.defenses import bido as bido
from keyhole.defenses import clip as clip
from keyhole.defenses import concealing as concealing
from keyhole.defenses import dp_sgd as dp_sgd
from keyhole.defenses import gaussian_noise as gaussian_noise
from keyhole.defenses import laplace_noise as laplace_noise
from keyhole.defenses import mid as mid
from keyhole.defenses import mid_unilateral as mid_unilateral
from keyhole.defenses import neg_label_smoothing as neg_label_smoothing
from keyhole.defenses import obscuring as obscuring
from keyhole.defenses import prune as prune
from keyhole.defenses import quantize as quantize
from keyhole.defenses import random_masking as random_masking
from keyhole.defenses import soteria as soteria
from keyhole.defenses import top_k as top_k
from keyhole.defenses import user_dp as user_dp
from keyhole.defenses import withhold as withhold
