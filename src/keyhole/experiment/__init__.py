"""From an audit file to stored outcomes: spec, plan, run, store."""

from keyhole.experiment.audit import audit
from keyhole.experiment.spec import Experiment, load_experiment, parse_experiment

__all__ = ["Experiment", "audit", "load_experiment", "parse_experiment"]
