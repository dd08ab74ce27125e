"""The kernels that exist: values, rules, spaces, and their source text. Pure: nothing is read, run or written."""
