"""How long a module is and how many ways lead through a function."""

import ast

ONE_MORE = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def ways(node):
    "How many ways this node alone adds: branches, loops, further operands of `and` and `or`."
    if isinstance(node, ONE_MORE):
        return 1
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    if isinstance(node, ast.match_case):
        return 0 if isinstance(node.pattern, ast.MatchAs) and node.pattern.pattern is None else 1
    return 0


def complexity(function):
    "Cyclomatic complexity of a function, what is defined inside it included."
    return 1 + sum(ways(n) for n in ast.walk(function))


def functions(tree):
    "(name, node) of every function and method of a module; those inside functions count there."
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{name}", inner) for name, inner in functions(node))
