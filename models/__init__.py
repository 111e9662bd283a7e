"""Model families: how to recognise one, what it is fed, what comes out; reference architectures and the zoo."""

if __name__ != "fusegen.models":
    raise ImportError(f"import {__name__!r} as 'fusegen.models'")
