"""TorchServe, its Java frontend run as a plain process."""
