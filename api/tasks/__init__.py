"""`POST /tasks/{task}`: the tasks of MII's legacy releases."""
