// strtod, whatever the user's locale has for a point.
#ifndef DEEPFM_TABLES_PLAIN_NUMBER_H_
#define DEEPFM_TABLES_PLAIN_NUMBER_H_

#include <locale.h>
#include <stdlib.h>

#include <string>

namespace deepfm {

// Made when the library is loaded: a child that is forked while another thread made it would wait for ever.
inline const locale_t kPlainLocale = newlocale(LC_ALL_MASK, "C", nullptr);

inline double PlainNumber(const char* begin, const char* end) {
  return strtod_l(std::string(begin, end).c_str(), nullptr, kPlainLocale);
}

}  // namespace deepfm

#endif  // DEEPFM_TABLES_PLAIN_NUMBER_H_
