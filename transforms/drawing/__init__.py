"""Models and plans as trees and pictures."""
