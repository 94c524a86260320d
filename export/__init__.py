"""Build-time only: turning models into files that other runtimes execute. No serving module imports this package."""
