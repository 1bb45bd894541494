// SPDX-License-Identifier: Apache-2.0
// The mapping of an image as XML: elements, comments and numbers.

import DiskFormats
import XMLText

extension ImageError {
  /// A reason of libxml2's.
  init(_ error: XMLError) {
    switch error {
    case .unavailable(let words): self.init(.unsupported, words)
    case .io(let error): self.init(error)
    case .malformed(let words): self.init(.badRequest, words)
    }
  }
}

private func xml<Value>(_ body: () throws(XMLError) -> Value) throws(ImageError) -> Value {
  do throws(XMLError) { return try body() } catch { throw ImageError(error) }
}

/// Writes a mapping to a file, to standard output without a path.
struct MappingWriter {
  private let writer: XMLWriter

  init(_ path: String?) throws(ImageError) {
    writer = try xml { () throws(XMLError) in try XMLWriter(path) }
  }

  func comment(_ text: String) throws(ImageError) {
    try xml { () throws(XMLError) in try writer.comment(text) }
  }

  func start(_ element: String, _ attributes: [(String, String)]) throws(ImageError) {
    try xml { () throws(XMLError) in try writer.start(element, attributes) }
  }

  func end() throws(ImageError) { try xml { () throws(XMLError) in try writer.end() } }

  /// Ends every element and writes what is left.
  func finish() throws(ImageError) { try xml { () throws(XMLError) in try writer.finish() } }
}

/// Reads a mapping as one element or comment after the other.
struct MappingReader {
  /// What was read.
  enum Node {
    case element(String)
    case comment(String)
  }

  private let reader: XMLReader

  init(_ path: String) throws(ImageError) {
    reader = try xml { () throws(XMLError) in try XMLReader(path) }
  }

  /// An error about what was read last.
  func refuse(_ words: String) -> ImageError { ImageError(reader.refuse(words)) }

  /// The next element or comment; nil at the end. Throws `badRequest` for what is no mapping.
  func next() throws(ImageError) -> Node? {
    while let node = try xml({ () throws(XMLError) in try reader.next() }) {
      switch node {
      case .element(let name, _):
        guard reader.depth < 4 else { throw refuse("elements too deep") }
        return .element(name)
      case .comment(let text): return .comment(text)
      case .end, .text: continue
      }
    }
    return nil
  }

  /// The number in an attribute. Throws `badRequest` when it is missing or no number.
  func number(_ name: String) throws(ImageError) -> UInt64 {
    guard let text = reader.attribute(name) else { throw refuse("\(name) is missing") }
    guard let number = UInt64(text) else { throw refuse("\(name)='\(text)' is no number") }
    return number
  }
}
