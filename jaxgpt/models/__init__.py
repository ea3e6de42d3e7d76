"""What the networks are: attention, layers, GPT, losses. Pure functions of parameters and arrays."""
