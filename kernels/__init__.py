"""The GPU half of fastopt, in Triton, which is imported by the modules in here but not by the package itself."""
