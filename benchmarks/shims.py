"""What lets `import transformers` succeed beside a torch that its torchvision was not built for."""

import torch

_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def let_transformers_import() -> None:
    """Declare the torchvision operators that are missing. Call it before the first `import transformers`.

    transformers imports torchvision, which registers fake kernels for its compiled operators when it is imported
    and fails where its binary doesn't match torch. Nothing here calls these operators: a declaration is enough.
    A torchvision that works is imported first and left alone.
    """
    global _library
    if _library is not None:
        return
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return  # transformers does without
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _OPERATORS.items():
            if not hasattr(torch.ops.torchvision, name):
                _library.define(schema)
