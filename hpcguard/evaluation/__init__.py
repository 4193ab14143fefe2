"""What is measured of a model: attacks, alarms, corruptions, explanations, the paper's claim, bounds."""
