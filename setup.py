"""Names the packages: everything in effjax/, and kernels/ installed as effjax.kernels."""

from setuptools import find_packages, setup

kernels = [f"effjax.{name}" for name in find_packages(include=["kernels", "kernels.*"])]
setup(packages=find_packages(include=["effjax", "effjax.*"]) + kernels)
