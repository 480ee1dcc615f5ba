"""Make spach_deploy/data/probes/*.jpg from pictures that the scikit-image wheel carries.

Run once, by hand, in an environment with the test extra: `python scripts/make_probes.py`. Sources and
licences stand in spach_deploy/data/probes/README.md. The same Pillow writes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import skimage
from PIL import Image

SOURCES = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "rocket.jpg",
)
SHORTER_SIDE = 320
QUALITY = 90
TARGET = Path(__file__).resolve().parent.parent / "spach_deploy" / "data" / "probes"


def shrink(image: Image.Image) -> Image.Image:
    """The picture with its shorter side at most SHORTER_SIDE."""
    scale = min(1.0, SHORTER_SIDE / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def main() -> None:
    """Write every probe and print its size."""
    TARGET.mkdir(exist_ok=True)
    for name in SOURCES:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            probe = shrink(image.convert("RGB"))
        target = TARGET / Path(name).with_suffix(".jpg").name
        probe.save(target, quality=QUALITY, optimize=True, subsampling=0)
        print(f"{target.name}: {probe.width} x {probe.height}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
