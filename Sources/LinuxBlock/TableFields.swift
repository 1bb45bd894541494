// SPDX-License-Identifier: Apache-2.0
// The words of one table line, taken one after the other, each by its name.

/// What is left of a line.
struct TableFields {
  let line: Int
  private var rest: ArraySlice<String>

  /// Splits a line at white space; a backslash quotes the letter after it. Source: dm-table.c.
  init(line: Int, _ text: Substring) {
    self.line = line
    var words: [String] = []
    var word: String?
    var quoted = false
    for letter in text {
      if quoted {
        word = (word ?? "") + String(letter)
        quoted = false
      } else if letter == "\\" {
        quoted = true
      } else if letter.isWhitespace {
        if let done = word { words.append(done) }
        word = nil
      } else {
        word = (word ?? "") + String(letter)
      }
    }
    if quoted { word = (word ?? "") + "\\" }
    if let done = word { words.append(done) }
    rest = words[...]
  }

  var isEmpty: Bool { rest.isEmpty }

  func fail(_ field: String, _ reason: String) -> TableError {
    TableError(line: line, field: field, reason)
  }

  mutating func word(_ field: String) throws(TableError) -> String {
    guard let word = rest.popFirst() else { throw fail(field, "is missing") }
    return word
  }

  mutating func number<N: FixedWidthInteger & UnsignedInteger>(
    _ field: String, as type: N.Type = N.self
  ) throws(TableError) -> N {
    let word = try word(field)
    guard word.utf8.allSatisfy({ (0x30...0x39).contains($0) }) else {
      throw fail(field, "'\(word)' is not a number")
    }
    guard let number = N(word) else { throw fail(field, "\(word) is more than \(N.max)") }
    return number
  }

  /// A number of things of which each takes at least so many words: never more than there are.
  mutating func count(_ field: String, words each: Int) throws(TableError) -> Int {
    let count: UInt32 = try number(field)
    guard Int(count) * each <= rest.count else {
      throw fail(field, "\(count) are named, the line has words for \(rest.count / each)")
    }
    return Int(count)
  }

  mutating func device(_ field: String) throws(TableError) -> DeviceReference {
    try reference(try word(field), field)
  }

  func reference(_ word: String, _ field: String) throws(TableError) -> DeviceReference {
    if word.hasPrefix("/") { return .path(word) }
    let parts = word.split(separator: ":", omittingEmptySubsequences: false)
    guard parts.count == 2, let major = UInt32(parts[0]), let minor = UInt32(parts[1]) else {
      throw fail(field, "'\(word)' is neither a path from / nor MAJOR:MINOR")
    }
    return .number(DeviceNumber(major: major, minor: minor))
  }

  mutating func location(_ suffix: String = "") throws(TableError) -> Location {
    let device = try device("DEV" + suffix)
    return Location(device, offset: try number("OFFSET" + suffix))
  }

  /// Throws unless every word has been taken.
  func end() throws(TableError) {
    guard let word = rest.first else { return }
    throw fail("end of line", "'\(word)' is a word too many")
  }
}
