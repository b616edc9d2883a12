PAGE = b""
