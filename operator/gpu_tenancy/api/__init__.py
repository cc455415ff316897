"""The kinds of the API group, one per file.

These pydantic models are the source of the CustomResourceDefinitions, of ``kubectl explain`` and of the field
reference. They hold no behaviour beyond parsing: decisions live in ``gpu_tenancy.core``.
"""
