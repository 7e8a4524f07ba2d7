"""Device code that several kernels share; a package only so that the files are installed."""
