"""Pure functions that methods combine: distances, penalties, label rules, search spaces."""
