"""fastdiff beside other libraries: their settings read, none of them imported."""
