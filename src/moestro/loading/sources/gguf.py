class GgufSource:
    pass
