// Instantiations that macros and conditions write. Its spellings are what is tested.
// clang-format off
#define ONE template void f<1>();
#define OF(a, ...) template void g<a, __VA_ARGS__>();
#define PASTE(a, b) a##b
#define TEXT(a) #a
#define AGAIN OF
#define SELF SELF ONE
ONE OF(2, 3) AGAIN(4, (5, 6)) PASTE(tem, plate) void h<7>();
char const* a = TEXT(template void f<8>(););
OF(PASTE(1, 2), TEXT())
SELF ;
#undef ONE
#define ONE template void f<9>();
ONE
#if defined ONE && (2 > 1 ? 1 : 0) && -7 / 2 == -3 && (1 << 3 | 1) == 9 && !('a' == 0) && 0x1F == 31 && 010 == 8
#elif 1
template void f<10>();
#else
template void f<11>();
#endif
#if UNDEFINED_NAME + 0 || 7 % 4 != 3 || ~0 != -1 || 1'000 != 1000
template void f<12>();
#elif 5 >> 1 == 2
template void f<13>();
#endif
#if 0
don't "mind
#elif 1 and not 0
template void f<14>();
#endif
%:define DIGRAPHS <:1:>
template void f<::global>();
template void f<sizeof(x <: 0 :>)>();
