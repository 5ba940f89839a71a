"""The pipelines that come with the package."""

from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"


def pretrained(name: str) -> str:
    """
    Folder of a pipeline that comes with the package: `NCSNPipeline.from_pretrained(pretrained("mnist"))` needs no
    network.

    Args:
        name (`str`):
            `"mnist"` and `"fashion_mnist"`, 28×28 grayscale digits and clothes; `"avatars"`, 16×16 faces in color;
            `"temperature"`, maps of 37×49 points in kelvin. The README.md in the folder is the pipeline's card.

    Raises:
        ValueError: there is no pipeline of that name.
    """
    names = sorted(path.parent.name for path in _ASSETS.glob("*/model_index.json"))
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}, not {name!r}.")
    return str(_ASSETS / name)


def find_pipeline(name: str) -> str:
    """What the commands take `name` for: a folder, else a pipeline of the package, else an id on the Hub."""
    if not Path(name).is_dir() and (_ASSETS / name / "model_index.json").is_file():
        return pretrained(name)
    return name
