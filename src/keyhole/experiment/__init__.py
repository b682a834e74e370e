"""From an audit file to stored outcomes: spec, plan, run, store."""
