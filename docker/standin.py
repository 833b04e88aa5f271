"""Fill the root of docker/Dockerfile.standin: the names, releases and places of what NVIDIA's containers have.

    python3 standin.py nemo|bridge

Releases are those of docker/README.md and, for what is not named there, of the uv.lock of Megatron-Bridge 0.3.0 and
0.6.0. Nothing can be imported: pip and `nemo-upcycle doctor` read metadata.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


VENV = Path("/opt/venv/lib/python3.12/site-packages")
SYSTEM = Path("/usr/local/lib/python3.12/dist-packages")
#: what is installed from a folder of sources: package -> the folder, and the one in it that holds `megatron`
EDITABLE = {
    "megatron-bridge": ("/opt/Megatron-Bridge", "src"),
    "megatron-core": ("/opt/Megatron-Bridge/3rdparty/Megatron-LM", ""),
}
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "{release}"
[tool.setuptools]
{package_dir}
packages.find = {{ where = ["{where}"], include = ["{package}", "{package}.*"] }}
"""
#: container -> what the PyTorch container below it has, outside of the environment
BELOW = {
    "nemo": "torch==2.10.0a0+b558c986e8.nv25.11 nvidia-modelopt==0.37.0 packaging==25.0 protobuf==6.33.5",
    "bridge": "torch==2.13.0a0+1.nv26.6 nvidia-modelopt==0.45.0 packaging==26.2 protobuf==6.33.6",
}
#: container -> what its environment has
OWN = {
    "nemo": """
        absl-py==2.4.0 accelerate==1.12.0 aiohttp==3.13.3 click==8.3.1 datasets==4.5.0 dill==0.4.0 einops==0.8.2
        fiddle==0.3.0 filelock==3.24.3 fsspec==2024.9.0 huggingface-hub==0.36.2 jinja2==3.1.6 leptonai==0.27.0
        lightning==2.4.0 megatron-bridge==0.3.0 megatron-core==0.16.0 ml-dtypes==0.5.4 multiprocess==0.70.18
        nemo-run==0.8.0 nemo-toolkit==2.7.0 numpy==1.26.4 nvidia-lm-eval==25.11.1 nvidia-modelopt==0.41.0
        nvidia-resiliency-ext==0.5.0 omegaconf==2.3.0 pandas==2.2.3 pyarrow==23.0.1 pyyaml==6.0.3 regex==2026.2.19
        requests==2.32.5 rich==14.3.3 safetensors==0.7.0 scikit-learn==1.7.2 scipy==1.15.3 sentencepiece==0.2.1
        six==1.17.0 tabulate==0.9.0 tensorstore==0.1.81 tiktoken==0.12.0 tokenizers==0.22.2 tqdm==4.67.3
        transformer-engine==2.12.0+5671fd36 transformers==4.57.6 typing-extensions==4.15.0 xxhash==3.6.0
    """,
    "bridge": """
        absl-py==2.5.0 accelerate==1.14.0 aiohttp==3.14.3 click==8.4.2 datasets==5.0.0 dill==0.4.1 einops==0.9.0.dev0
        filelock==3.32.0 fsspec==2026.4.0 huggingface-hub==1.24.0 jinja2==3.1.6 leptonai==0.27.3
        megatron-bridge==0.6.0 megatron-core==0.19.0 multiprocess==0.70.19 nemo-run==0.11.0 numpy==1.26.4
        nvidia-lm-eval==25.11.1 nvidia-modelopt==0.46.0rc1 nvidia-resiliency-ext==0.6.0 omegaconf==2.3.1
        pandas==2.2.3 pyarrow==24.0.0 pyyaml==6.0.3 regex==2026.7.19 requests==2.34.2 rich==15.0.0 safetensors==0.8.0
        scikit-learn==1.9.0 scipy==1.17.1 sentencepiece==0.2.2 six==1.17.0 tabulate==0.10.0 tiktoken==0.13.0
        tokenizers==0.22.2 tqdm==4.69.1 transformer-engine==2.17.1+4329ff84 transformers==5.12.1
        typing-extensions==4.16.0 xxhash==3.8.1
    """,
}


def main(container: str) -> None:
    """Make the environment, the metadata, the sources, NVIDIA's constraints and the hashes of all of it."""
    venv = ["/usr/bin/python3", "-m", "venv", "--without-pip", "--system-site-packages", "/opt/venv"]
    subprocess.run(venv, check=True)
    SYSTEM.mkdir(parents=True, exist_ok=True)
    for site, pins in ((SYSTEM, BELOW[container]), (VENV, OWN[container])):
        for pin in pins.split():
            install(site, *pin.split("=="))
    constraints = Path("/etc/pip/constraint.txt")
    constraints.parent.mkdir()
    constraints.write_text("\n".join(OWN[container].split()) + "\n")
    hashes = "find /opt /usr/lib/python3* /usr/local -type f ! -name '*.pyc' -exec sha256sum {} + > /root/own.sha256"
    subprocess.run(["bash", "-c", hashes], check=True)


def install(site: Path, name: str, release: str) -> None:
    """Write a package's metadata, or its sources, and install them."""
    if name in EDITABLE:
        folder, inner = EDITABLE[name]
        package = Path(folder, inner, name.replace("-", "/"))
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "package_info.py").write_text(f'__version__ = "{release}"\n')
        fields = {"name": name, "release": release, "where": inner or ".", "package": name.replace("-", ".")}
        package_dir = f'package-dir = {{ "" = "{inner}" }}' if inner else ""
        Path(folder, "pyproject.toml").write_text(PROJECT.format(**fields, package_dir=package_dir))
        pip = ["/opt/venv/bin/python", "-m", "pip", "install", "--no-deps", "-e", folder]
        subprocess.run(pip, check=True)
        return
    metadata = site / f"{name.replace('-', '_')}-{release}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


if __name__ == "__main__":
    main(sys.argv[1])
