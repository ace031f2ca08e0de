"""Speed and memory, claimed as ratios to a plain loop over the same input in the same run."""
