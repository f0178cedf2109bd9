"""The lab: where small models are trained for a verdict."""
