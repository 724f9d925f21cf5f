// SPDX-License-Identifier: Apache-2.0
// As much JSON as a manifest needs: objects, arrays, strings, 64-bit integers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace knnfast {

struct Json {
  enum Kind { integer, string, array, object } kind = integer;
  int64_t number = 0;
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  // Throw std::runtime_error naming the field when it is missing or of another kind.
  const Json& at(const std::string& name, Kind wanted) const;
  int64_t integer_at(const std::string& name, int64_t low, int64_t high) const;
};

Json parse_json(const char* begin, const char* end);  // throws std::runtime_error
std::string quoted(const std::string& text);

}  // namespace knnfast
