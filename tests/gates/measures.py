"""Counts of a module: ways through a function, tokens of a line, what stands inside what."""

import ast
import io
import tokenize

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


SILENT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def tokens_of_lines(text):
    "How many tokens each logical line of a module has, comments not counted."
    count = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            yield count
            count = 0
        elif token.type not in SILENT:
            count += 1


def parallel_assignments(tree):
    "Assignments of several values at once, a swap excepted."
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if isinstance(node.value, ast.Tuple) and not is_swap(node):
                found.append(node)
    return found


def is_swap(node):
    "Whether an assignment puts the same names in another order."
    targets = sorted(ast.unparse(e) for e in node.targets[0].elts)
    return targets == sorted(ast.unparse(e) for e in node.value.elts)


def named_lambdas(tree):
    "Lambdas that are given a name."
    assigned = (n for n in ast.walk(tree) if isinstance(n, (ast.Assign, ast.AnnAssign)))
    return [n for n in assigned if isinstance(n.value, ast.Lambda)]


def nested_conditions(tree):
    "Conditional expressions (`a if b else c`) that stand inside another."
    conditions = [n for n in ast.walk(tree) if isinstance(n, ast.IfExp)]
    return [inner for n in conditions for inner in ast.walk(n) if is_condition(inner, n)]


def is_condition(node, outer):
    "Whether a node is a conditional expression other than `outer`."
    return isinstance(node, ast.IfExp) and node is not outer
