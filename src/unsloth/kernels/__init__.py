"""GPU kernels, one operation a file, each beside its formula and its plain-torch reference."""
