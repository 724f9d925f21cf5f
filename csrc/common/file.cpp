// SPDX-License-Identifier: Apache-2.0
#include "common/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <system_error>

#include "knnfast/index.h"

namespace knnfast {
namespace {

struct CrcTables {
  uint32_t t[8][256];
  constexpr CrcTables() : t() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
      t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
  }
};
constexpr CrcTables kCrc;

// Eight bytes at a time.
uint32_t crc_by_tables(const unsigned char* p, size_t bytes, uint32_t crc) {
  for (; bytes >= 8; bytes -= 8, p += 8) {
    const uint32_t low = crc ^ (p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24);
    crc = kCrc.t[7][low & 255] ^ kCrc.t[6][low >> 8 & 255] ^ kCrc.t[5][low >> 16 & 255] ^
          kCrc.t[4][low >> 24] ^ kCrc.t[3][p[4]] ^ kCrc.t[2][p[5]] ^ kCrc.t[1][p[6]] ^
          kCrc.t[0][p[7]];
  }
  for (; bytes; --bytes, ++p) crc = crc >> 8 ^ kCrc.t[0][(crc ^ *p) & 255];
  return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) uint32_t crc_by_instruction(const unsigned char* p, size_t bytes,
                                                              uint32_t crc) {
  uint64_t sum = crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    sum = __builtin_ia32_crc32di(sum, word);
  }
  return crc_by_tables(p, bytes, static_cast<uint32_t>(sum));
}
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  const unsigned char* p = static_cast<const unsigned char*>(data);
#ifdef __x86_64__
  if (__builtin_cpu_supports("sse4.2")) return ~crc_by_instruction(p, bytes, ~crc);
#endif
  return ~crc_by_tables(p, bytes, ~crc);
}

void fail(const std::string& what, const std::string& path) {
  throw std::system_error(errno, std::generic_category(), what + " " + path);
}
void damaged(const std::string& path, const std::string& why) {
  throw DamagedFile(path + ": " + why);
}

File::File(const std::string& path, int flags)
    : path_(path),
      fd_(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, 0644)) {  // a FIFO does not hang
  if (fd_ < 0) fail("cannot open", path);
}
File::~File() { ::close(fd_); }

uint64_t File::size() const {
  struct stat s;
  if (fstat(fd_, &s)) fail("cannot stat", path_);
  if (!S_ISREG(s.st_mode)) damaged(path_, "not a regular file");
  return static_cast<uint64_t>(s.st_size);
}

void File::write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes) {
    const ssize_t n = ::write(fd_, p, std::min<size_t>(bytes, size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) fail("cannot write", path_);
    p += n;
    bytes -= static_cast<size_t>(n);
  }
}

void File::read(void* data, size_t bytes) {
  char* p = static_cast<char*>(data);
  while (bytes) {
    const ssize_t n = ::read(fd_, p, std::min<size_t>(bytes, size_t{1} << 30));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("cannot read", path_);
    if (n == 0) damaged(path_, "it ends early");
    p += n;
    bytes -= static_cast<size_t>(n);
  }
}

void File::sync() {
  if (fsync(fd_)) fail("cannot sync", path_);
}

FolderLock::FolderLock(const std::string& folder) : folder_(folder, O_RDONLY | O_DIRECTORY) {
  while (flock(folder_.fd(), LOCK_EX) && errno == EINTR) {
  }
}
FolderLock::~FolderLock() { flock(folder_.fd(), LOCK_UN); }  // a forked child may hold it, too

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&std::free)> real(realpath(path.c_str(), nullptr),
                                                         &std::free);
  if (!real) fail("cannot resolve", path);
  return real.get();
}

void sync_folder(const std::string& folder) { File(folder, O_RDONLY | O_DIRECTORY).sync(); }

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  DIR* dir = opendir(folder.c_str());
  if (!dir) fail("cannot list", folder);
  while (const dirent* e = readdir(dir)) names.push_back(e->d_name);
  closedir(dir);
  return names;
}

}  // namespace knnfast
