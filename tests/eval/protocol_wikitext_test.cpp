#include "eval/protocol_wikitext.h"

#include <gtest/gtest.h>

namespace sagelm {
namespace {

using Pages = std::vector<std::string>;
using Windows = std::vector<Window>;

TEST(Wikitext, PagesBeginWithTheirTitles) {
  EXPECT_EQ(wikitext_pages(" \n = A = \n x \n = = B = = \n y \n\n = C = \n z\n"),
            (Pages{" = A = \n x \n = = B = = \n y \n", " = C = \n z\n"}));
  EXPECT_EQ(wikitext_pages("no title\nat all"), (Pages{"no title\nat all"}));
  EXPECT_EQ(wikitext_pages("before\n = A = \r\n x"), (Pages{"before", " = A = \n x"}));
}

TEST(Wikitext, DetokenizerQuirks) {
  EXPECT_EQ(wikitext_detokenize("the dogs ' bone"), "the dogs' bone");
  EXPECT_EQ(wikitext_detokenize("1 @,@ 234 @.@ 5 well @-@ known"), "1,234.5 well-known");
  EXPECT_EQ(wikitext_detokenize("One : two ; three . Four ! Five ? Six , seven"),
            "One: two; three. Four! Five? Six, seven");
  EXPECT_EQ(wikitext_detokenize("a ( b ) [ c ] { d } \" e \" f ' g '"),
            "a (b) [c] {d} \"e\" f 'g'");
  EXPECT_EQ(wikitext_detokenize("= = = = x = = = y = ="), "==== x === y ==");
  EXPECT_EQ(wikitext_detokenize("20 \xC2\xB0 C"),
            "20\xC2\xB0"
            "C");
  EXPECT_EQ(wikitext_detokenize("end \n next N of it 's"), "end\nnext 1 of it's");
  EXPECT_EQ(wikitext_detokenize("/' 7/"), "/'[0-9]/");  // the harness's own replacement
  EXPECT_EQ(wikitext_detokenize("' 7"), "' 7");
}

TEST(Wikitext, WordsCountEmptyPiecesAtTheEnds) {
  EXPECT_EQ(wikitext_words("a b"), 2);
  EXPECT_EQ(wikitext_words(" a  b\n"), 4);
  EXPECT_EQ(wikitext_words(""), 1);
  EXPECT_EQ(wikitext_words("a\xC2\xA0"
                           "b"),
            2);  // white space of Unicode, as Python's \s
}

TEST(Wikitext, RollingWindowsAsTheHarnessMakesThem) {
  // Its own example: 10 tokens after the prefix, 4 at a time.
  EXPECT_EQ(rolling_windows(11, 4), (Windows{{0, 5, 1}, {4, 9, 5}, {6, 11, 9}}));
  EXPECT_EQ(rolling_windows(5, 4), (Windows{{0, 5, 1}}));
  EXPECT_EQ(rolling_windows(3, 4), (Windows{{0, 3, 1}}));
  EXPECT_EQ(rolling_windows(1, 4), Windows{});
}

}  // namespace
}  // namespace sagelm
