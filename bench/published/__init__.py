"""Networks at their published sizes with random weights, run by every peer that can, each in a process of its own."""
