"""Importing streaming without what it brings along that nothing here needs."""

import sys
from types import ModuleType

_UNUSED: dict[str, tuple[str, ...]] = {
    # other people's data sets
    "streaming.multimodal": (),
    "streaming.text": (),
    "streaming.vision": (),
    # batches whose samples its loader could count, too
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
}
"""Modules, which import transformers, torchvision, scikit-learn and pandas, and the classes that are asked of them."""


def import_streaming() -> None:
    """Import streaming in a fifth of the time: call it before the first `import streaming`.

    Every rank would else read thousands of files at each start. Others can import the real modules afterwards.
    """
    if "streaming" in sys.modules:
        return
    stand_ins = {name: ModuleType(name) for name in _UNUSED if name not in sys.modules}
    for name, module in stand_ins.items():
        for asked in _UNUSED[name]:
            setattr(module, asked, type(asked, (), {}))
    sys.modules.update(stand_ins)
    try:
        import streaming  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]
