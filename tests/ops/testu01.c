/* SmallCrush or Crush of TestU01 (L'Ecuyer and Simard) on 32-bit words from the standard input: a line
 * "name|p" for each of its statistics. `battery.py` compiles it. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <testu01/bbattery.h>
#include <testu01/swrite.h>
#include <testu01/unif01.h>

static unsigned int words[1 << 16];
static size_t at = 0, count = 0;

static unsigned int next_word(void) {
  if (at == count) {
    count = fread(words, sizeof *words, 1 << 16, stdin);
    at = 0;
    if (count == 0) {
      fprintf(stderr, "the stream has ended\n");
      exit(1);
    }
  }
  return words[at++];
}

int main(int argc, char **argv) {
  unif01_Gen *masks = unif01_CreateExternGenBits("masks", next_word);
  swrite_Basic = FALSE;
  if (argc > 1 && !strcmp(argv[1], "Crush"))
    bbattery_Crush(masks);
  else
    bbattery_SmallCrush(masks);
  for (int number = 0; number < bbattery_NTests; ++number)
    printf("%s|%.17g\n", bbattery_TestNames[number], bbattery_pVal[number]);
  unif01_DeleteExternGenBits(masks);
  return 0;
}
