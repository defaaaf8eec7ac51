"""Which packages there are; everything else about the project is declared in pyproject.toml.

`dalle2_fast/kernels` is a relative symlink to `kernels/`, and `kernels/` has no `__init__.py`, so the
namespace search below finds it as `dalle2_fast.kernels` in a wheel, an sdist and an editable install alike.
A `package_dir` mapping breaks one of those cases, and an `__init__.py` in the top-level `kernels/` would hide
the package of that name from every program that runs in this folder. tests/test_packaging.py holds each case.
"""

from setuptools import find_namespace_packages, setup

setup(
    # pretrained/ is data, not code: without the exclusion its folders would be listed as packages.
    packages=find_namespace_packages(include=["dalle2_fast*"], exclude=["dalle2_fast.pretrained*"]),
    package_data={"dalle2_fast": ["pretrained/**"]},
    include_package_data=False,
)
