"""Photographs inside the packages scikit-image and scikit-learn, for use without a network."""

from __future__ import annotations

from smalto.images.image_file import ImageFile
from smalto.images.packages import package_folder

SOURCE = "bundled"

CREDITS = {
    "astronaut.png": "Eileen Collins, NASA (public domain)",
    "camera.png": "Lav Varshney (CC0)",
    "chelsea.png": "Chelsea the cat, Stefan van der Walt (CC0)",
    "china.jpg": "danielbuechele, Flickr (CC BY 2.0)",
    "coffee.png": "Rachel Michetti, Pikolo Espresso Bar (CC0)",
    "coins.png": "Brooklyn Museum (no known copyright restrictions)",
    "flower.jpg": "vultilion, Flickr (CC BY 2.0)",
    "hubble_deep_field.jpg": "NASA and ESA (public domain)",
    "ihc.png": "Center for Microscopy And Molecular Imaging (no known copyright restrictions)",
    "motorcycle_left.png": "Scharstein et al., Middlebury Stereo Datasets 2014",
    "retina.jpg": "Häggström 2014, Wikimedia Commons (CC0)",
    "rocket.jpg": "SpaceX (public domain)",
}
HELD_OUT = ("chelsea.png", "coffee.png", "rocket.jpg")


def bundled_photographs() -> list[ImageFile]:
    """Return the photographs, sorted by name.

    Raises:
        MissingExtra: scikit-image or scikit-learn is not installed.
    """
    use = "demo", "the bundled photographs"
    folders = [
        package_folder("skimage", "scikit-image", *use) / "data",
        package_folder("sklearn", "scikit-learn", *use) / "datasets" / "images",
    ]
    return [
        ImageFile(name, str(folder / name))
        for name in sorted(CREDITS)
        for folder in folders
        if (folder / name).is_file()
    ]


def credit(name: str) -> str:
    """Return the author and license of a bundled photograph; empty for other names."""
    return CREDITS.get(name, "")
