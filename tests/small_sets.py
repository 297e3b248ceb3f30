"Data sets of a few small pictures: bright squares, in one modality and as negatives in the other."

from pathlib import Path

import numpy as np
from PIL import Image


def write_modality(folder, people, negative=False, images=2, first=0):
    "images/, labels/ and groups.csv: `images` of 48 x 48 px for each of `people`."
    folder = Path(folder)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    lines = ["id,group"]
    for n, person in enumerate(people, start=first):
        for k in range(images):
            label = np.zeros((48, 48), np.uint8)
            label[4 + 2 * n : 20 + 2 * n, 8 + 4 * k : 24 + 4 * k] = 1
            image = 200 - 120 * label if negative else 60 + 120 * label
            Image.fromarray(image).save(folder / "images" / f"{person}{k}.png")
            Image.fromarray(label).save(folder / "labels" / f"{person}{k}.png")
            lines.append(f"{person}{k},{person}")
    (folder / "groups.csv").write_text("\n".join(lines) + "\n")


def write_pair(folder, teacher, student, names=("t2", "t1")):
    "A set of two modalities, the first a negative; the people of each. Returns the folder as text."
    write_modality(Path(folder) / names[0], teacher, negative=True)
    write_modality(Path(folder) / names[1], student)
    return str(folder)
